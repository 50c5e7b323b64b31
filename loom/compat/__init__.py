"""The API of loom-agent 0.6, frozen: for programs written for it. The phases and node hosts use none of it."""
