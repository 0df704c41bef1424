"""Context managers, usable in a plain loop, that the callbacks are made of."""
