// Named by an #include of c10d and otherwise unused here: see context.h.
#pragma once
