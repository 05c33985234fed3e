"""The attention rewrite: finds attention, brings it to four dimensions, chooses a kernel and inserts it."""
