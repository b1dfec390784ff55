"""Effects: vendor libraries, members, virtual slots, logins and objects, driven by the decisions of `core`."""
