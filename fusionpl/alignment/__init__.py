"""Alignment: a TransportMap for every axis of a parent, from evidence about its units."""
