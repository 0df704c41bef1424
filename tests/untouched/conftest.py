"""The projects train when they are imported, as scripts do."""

collect_ignore = ["projects"]
