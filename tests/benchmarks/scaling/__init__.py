"""How time, memory and disk grow with the number of images; see ``__main__``."""
