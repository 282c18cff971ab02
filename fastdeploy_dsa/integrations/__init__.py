"""Adapters to frameworks that this package plugs into; nothing else imports them."""
