"""Times feature databases on data made in the shape of the released ones; see ``__main__``."""
