"""Span corruption: rows out of running text or packed documents, masked, in batches."""
