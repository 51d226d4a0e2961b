"""From records to what people read: tables, pictures and the report. Nothing here measures."""
