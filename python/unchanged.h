// SPDX-License-Identifier: Apache-2.0
// Whether modules still hold what a prepared call was made of, in one call: asked before every token, of
// objects that the weights read in between have driven from the caches.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace mosaic::python {

// Whether holders[i][names[i]] is objects[i] for each i, None also where there is no such name; and whether
// its data_ptr() is addresses[i], of 8 bytes each, unless that is 0. `holders` is a tuple of dicts, or one
// dict for all; an object may be a weak reference to what is meant. `kept` receives what was found: other
// threads may replace it as soon as the interpreter lock is released, and it must outlive the call all the
// same.
bool unchanged(const pybind11::object& holders, const pybind11::tuple& names, const pybind11::tuple& objects,
               const pybind11::bytes& addresses, std::vector<pybind11::object>* kept = nullptr);

}  // namespace mosaic::python
