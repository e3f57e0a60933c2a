"""The papers' tables from our own runs."""
