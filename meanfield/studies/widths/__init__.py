"""How networks of finite width approach the continuous one."""
