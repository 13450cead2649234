"""Errors, command line, collectives, files. Imports none of the project's other packages."""
