# Lays the library out inside the Python package, when scikit-build-core builds the wheel. Everything here belongs to the
# component "python", the only one that the wheel takes.

# A wheel holds no symbolic links, so the library goes in under its plain name, without the versioned chain.
set_property(TARGET adaattn PROPERTY VERSION)
set_property(TARGET adaattn PROPERTY SOVERSION)
set_property(TARGET adaattn PROPERTY INSTALL_RPATH "$ORIGIN")
install(TARGETS adaattn LIBRARY DESTINATION adaattn/lib COMPONENT python)

# Debian ships Highway as a shared library only; it travels along, so that the wheel runs where Highway is not installed.
get_target_property(_hwy_type hwy::hwy TYPE)
if(_hwy_type STREQUAL "SHARED_LIBRARY")
  install(FILES $<TARGET_FILE:hwy::hwy> RENAME $<TARGET_SONAME_FILE_NAME:hwy::hwy> DESTINATION adaattn/lib
          COMPONENT python)
endif()
