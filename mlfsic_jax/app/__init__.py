"""The app in which people label a folder of photos in the browser; it imports from below, and nothing imports it."""
