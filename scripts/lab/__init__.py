"""The laboratory: what the commands in scripts/ share. It imports the library, which never imports it."""
