"""The stages, the run folder and the command line around the library ``grappa``."""
