"""Reports from run directories: files in, tables, figures and a page out; never torch or Lightning."""
