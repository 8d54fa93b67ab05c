"""The verbs of the command line, a file each: `add_arguments(parser)` and `execute(arguments) -> JSON value`."""
