"""The commands: each parses its flags, calls the package and reports."""
