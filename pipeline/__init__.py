"""The stages, the run folder and the command line, which use the library ``grappa``."""
