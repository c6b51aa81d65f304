"""`grappa explore`: a run as a page in the browser, served by this machine to itself."""
