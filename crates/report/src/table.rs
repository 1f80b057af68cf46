//! Figures under a title, for a terminal and as HTML.

use std::fmt::Write as _;

use crate::plot::escaped;

/// Figures under a title: the first column is text, the others are numbers.
pub struct Section {
    /// What is above it.
    pub title: String,
    /// Names of the columns.
    pub header: Vec<String>,
    /// As many cells each as there are columns.
    pub rows: Vec<Vec<String>>,
}

/// A section of its parts.
pub fn section(title: &str, header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> Section {
    Section {
        title: title.to_owned(),
        header: header.iter().map(|&name| name.to_owned()).collect(),
        rows: rows.collect(),
    }
}

/// Title and aligned columns.
pub fn text(out: &mut String, section: &Section) {
    let Section {
        title,
        header,
        rows,
    } = section;
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
        widest.max(header[column].chars().count())
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let _ = writeln!(out, "\n{title}");
    for row in std::iter::once(header).chain(rows) {
        let mut line = String::from(" ");
        for (i, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let _ = match i {
                0 => write!(line, " {cell:<width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
}

/// Writes figures as a table of HTML.
pub fn figures(page: &mut String, section: &Section) {
    let _ = write!(
        page,
        "<div class=\"table\"><table><caption>{}</caption><thead><tr>",
        escaped(&section.title)
    );
    for name in &section.header {
        let _ = write!(page, "<th>{}</th>", escaped(name));
    }
    page.push_str("</tr></thead><tbody>");
    for row in &section.rows {
        page.push_str("<tr>");
        for cell in row {
            let _ = write!(page, "<td>{}</td>", escaped(cell));
        }
        page.push_str("</tr>");
    }
    page.push_str("</tbody></table></div>");
}
