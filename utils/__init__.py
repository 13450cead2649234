"""The ground floor: errors, the command line, collectives; imports none of the other packages."""
