"""Callbacks: one thin file a technique."""
