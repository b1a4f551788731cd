"""Components that ship: `fn: reward_server.library.text:repetition` and so on; docs/components.md lists them."""
