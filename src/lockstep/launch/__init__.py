"""How this process was started, and what it runs on."""
