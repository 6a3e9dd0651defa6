"""The subcommands of `sixfold`, one file each, imported when they are called."""
