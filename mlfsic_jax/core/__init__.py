"""The method as functions of arrays; no file, config or print."""
