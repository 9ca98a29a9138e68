"""Where samples come from: image folders, encoder caches, the exact mixture. No network is here."""
