"""Who a caller is and what it may do: certificates, tokens, roles, and the table of all calls."""
