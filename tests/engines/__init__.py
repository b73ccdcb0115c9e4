"""Scripts that train with an exported plan in a real engine, and print what the engine says of it."""
