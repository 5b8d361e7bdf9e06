"""What people look at: the terminal, tables, figures."""
