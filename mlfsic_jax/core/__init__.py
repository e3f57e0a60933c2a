"""The method as functions of arrays: no file, no config, no print."""
