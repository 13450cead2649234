"""Download, check and make data sets; the package ``datasets`` reads them."""
