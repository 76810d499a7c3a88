"""See DESIGN: one file here is one method or one shared part; the registry finds methods by file name."""
