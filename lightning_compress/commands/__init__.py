"""What the subcommands of ``lightning-compress`` do; each is imported when it is called."""
