"""The command line: adaattn COMMAND. Each module here with an add_parser(subparsers) is a command."""
