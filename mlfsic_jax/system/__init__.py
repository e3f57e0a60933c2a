"""What every command stands on: errors, signals, progress, files, devices."""
