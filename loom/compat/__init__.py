"""The API of loom-agent 0.6, for programs written for it. The cluster itself uses none of it."""
