"""Everything that relies on private names of Lightning."""
