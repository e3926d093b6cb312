"""How bytes get from one process or machine to another."""
