"""DataModules whose batch is always {"x1": ..., "y": ...?, "index": ...}."""
