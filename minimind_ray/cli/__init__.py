"""The command line: one file per command. Commands parse options, call the package, and print."""
