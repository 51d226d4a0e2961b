"""From records to what people read: tables, pictures, the report as Markdown and as a page, and the
numbers in the README. Nothing here measures."""
