"""Getting, checking and making the data sets; the readers are in the package ``datasets``."""
