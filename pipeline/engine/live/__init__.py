"""The collection that a run serves: its images, those added later, those taken out; and what is chosen from them."""
