"""One experiment on disk: where config, files and library meet."""
