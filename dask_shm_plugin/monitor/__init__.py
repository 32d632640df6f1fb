"""What people look at: the command line, the dashboard's page, metrics and notebooks."""
