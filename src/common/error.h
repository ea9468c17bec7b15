// The exception that carries a status of the C interface, and the one way to compose its message.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "adaattn/adaattn.h"

namespace adaattn {

class StatusError : public std::runtime_error {
 public:
  StatusError(adaattn_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  adaattn_status status() const { return status_; }

 private:
  adaattn_status status_;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  throw StatusError(ADAATTN_INVALID_ARGUMENT, concat(parts...));
}

}  // namespace adaattn
