# What `cmake --install` puts where: headers, the library, the CMake package adaattn and a pkg-config file.
install(TARGETS adaattn EXPORT adaattn-targets
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} NAMELINK_COMPONENT development)
install(DIRECTORY include/adaattn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

set(_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/adaattn)
install(EXPORT adaattn-targets NAMESPACE adaattn:: DESTINATION ${_package_dir} FILE adaattn-config.cmake)
# Before 1.0 a minor version may break its users.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/adaattn-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/adaattn-config-version.cmake DESTINATION ${_package_dir})

file(RELATIVE_PATH _prefix_from_pkgconfig /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(cmake/adaattn.pc.in adaattn.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/adaattn.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
