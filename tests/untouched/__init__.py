"""Whole projects that know nothing of this package, each compressed from outside by ``lightning-compress run``."""
